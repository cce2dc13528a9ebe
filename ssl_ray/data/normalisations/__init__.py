"""From a scan's intensities to the integers that are stored, and to what the network sees of them: a folder a kind."""
