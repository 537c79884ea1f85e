//go:build mutant_learns

package appliance

const saysWhatItLearns = false
