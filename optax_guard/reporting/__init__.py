"""Reading optimizer states: numbers, words, pictures."""
