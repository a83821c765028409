"""What any part may use: files, pictures, the command line, signals, who this process is."""
