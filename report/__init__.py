"""From images to numbers, curves and pages."""
