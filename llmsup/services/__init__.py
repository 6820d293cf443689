"""One product a file: its flags, URLs and file formats. Pure."""
