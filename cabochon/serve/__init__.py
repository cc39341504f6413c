"""An OpenAI-compatible server on the slot engine: `cabochon serve`, docs/serving.md."""
