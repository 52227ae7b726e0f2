"""Which steps a result was measured on."""

import hashlib

from vlm_local.lab.offline.rows import Rows


def hash_labels(rows: Rows) -> str:
    """sha256 of (episode, step, label) of all rows: alike for two evaluations of the same steps."""
    digest = hashlib.sha256()
    for episode, step, label in zip(rows.episode_ids[rows.episode], rows.step, rows.label_phrases, strict=True):
        digest.update(f"{episode}/{step}/{label}\n".encode())
    return digest.hexdigest()
