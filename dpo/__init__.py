"""Preference fine-tuning: SFT, then DPO, conservative DPO or IPO, as steps that meet on disk."""

__version__ = "0.1.0"
