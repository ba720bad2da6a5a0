"""What the scripts share, a file for each subject."""
