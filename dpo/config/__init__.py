"""Settings: types, composition, pipeline parameters, and which step reads what."""
