"""The task as text, without torch: prompts, answers, what an answer means, how it scores."""
