"""Token ids: files, streams of several files, and the cache of encoded text."""
