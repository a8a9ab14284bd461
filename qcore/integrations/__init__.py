"""Models that qcore loads in other projects' tools."""
