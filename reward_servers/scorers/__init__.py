"""One file a reward: the definitions of design and papers, each under a name that is its version."""
