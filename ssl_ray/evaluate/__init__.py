"""From a network's output to scores on the volume's own grid."""
