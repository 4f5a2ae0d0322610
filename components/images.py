"""Names of the images that steps run in.

They are placeholders: ``submit.py`` and ``make pipeline`` put digests or tags in their place when a
package is made. (``python`` stands in the names because kfp's subprocess runner warns without it.)
"""

DATA_IMAGE = "dpo-python-data:unset"
"""No torch: fingerprint, ingest, gate, publish."""
TRAIN_IMAGE = "dpo-python-train:unset"
"""torch: sft, reference, preference, evaluate."""
