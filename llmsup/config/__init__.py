"""What a profile may say, and where llmsup keeps its files."""
