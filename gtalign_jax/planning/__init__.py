"""Planning a run on an accelerator that is not here: what its compiled programs need and cost."""
