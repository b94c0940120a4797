"""Files a run leaves for people: JSON lines, rollout dumps, progress, figures and the report page."""
