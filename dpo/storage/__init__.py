"""Everything on disk and in stores: manifests, progress, fingerprints, base models."""
