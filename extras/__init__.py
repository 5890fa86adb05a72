"""What nobody needs in order to understand or run the method; each file is a script with its own --help."""
