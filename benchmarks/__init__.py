"""Speed of ktjax against this machine's limits and against its peers."""
