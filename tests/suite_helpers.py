"""A fine-tuning job of seconds, for the tests of the suites."""

import dataclasses

from experiments import jobs

CHUNK = 5
TINY_JOB = dataclasses.replace(
    jobs.NANO,
    base=jobs.Base(
        "tiny",
        jobs.byte_decoder(8, 1, 2, 16),
        jobs.PretrainConfig(
            steps=10, batch_size=4, learning_rate=1e-3, chunk_steps=CHUNK, checkpoint_steps=CHUNK
        ),
    ),
    reference_lr=1e-3,
    steps=20,
    batch_size=4,
    seq_len=16,
    chunk_steps=CHUNK,
    checkpoint_steps=2 * CHUNK,
    heldout_batch_size=4,
    heldout_tokens=600,
)
