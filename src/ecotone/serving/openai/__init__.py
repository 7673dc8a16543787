"""A language model behind the HTTP interface that OpenAI's clients speak. No engine is known here, only a `Backend`."""
