"""What is said about methods: what one is made of, what it needs of a run, and where a run falls short."""
