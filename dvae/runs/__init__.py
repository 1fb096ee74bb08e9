"""Run folders: what they hold, and how runs are started, followed, resumed and canceled."""
