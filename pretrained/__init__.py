"""Other people's networks and files: find, read, rename, convert and run them."""
