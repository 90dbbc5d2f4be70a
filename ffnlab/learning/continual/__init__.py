"""Learning tasks one after the other, by a hypernetwork that keeps what it gave for each."""
