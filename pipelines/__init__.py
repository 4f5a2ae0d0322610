"""The pipeline, its compiled package, and how runs of it are started and watched."""
