//go:build !mutant_single_copy

package appliance

const singleCopy = false
