"""What the network learns without labels, one package a task."""
