"""What is computed of tokens, one step each way: named statistics from raw ones, and sums of terms."""
