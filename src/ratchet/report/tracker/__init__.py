"""Copy the metric rows of a run to trackers: a follower that the launcher starts, and the places it writes to."""
