"""What all folders share: command line, devices, images, safe writing, processes."""
