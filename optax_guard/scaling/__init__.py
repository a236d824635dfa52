"""Loss scaling for float16."""
