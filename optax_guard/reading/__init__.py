"""What states say, in numbers and in words."""
