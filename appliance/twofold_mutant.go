//go:build mutant_single_copy

package appliance

// singleCopy believes a small file without its copy: a control for the tests of
// flipped bits, which must fail with it.
const singleCopy = true
