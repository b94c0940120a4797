"""What a cold start shows on real questions: texts made of what the truths store."""
