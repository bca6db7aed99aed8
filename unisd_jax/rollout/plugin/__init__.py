"""What vLLM loads into its own process: this folder is on its path, and nothing else of the package."""
