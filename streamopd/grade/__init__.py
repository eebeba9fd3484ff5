"""Was the answer right? Graders by name, and a pool of processes that outlives any of them."""
