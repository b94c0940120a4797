"""What a run is made of and leaves behind: settings, job, phases, groups, scores, checkpoints, log."""
