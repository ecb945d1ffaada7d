"""Where bytes rest: weights and the paged KV cache. Knows nothing of models' wiring or of schedules."""
