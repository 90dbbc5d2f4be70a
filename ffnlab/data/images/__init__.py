"""Images: folders of files, and IDX files."""
