"""Where data comes from: files, the Hub, streams, caches and the order of batches. Imports no higher layer."""
