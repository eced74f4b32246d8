"""From nothing to the paper's Table 1 and 3: needed files, check of the machine, resumable stages, comparison."""
