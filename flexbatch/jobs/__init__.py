"""The files of a job: input rows, the journal of finished rows, the output. Knows nothing of models or tokenizers."""
