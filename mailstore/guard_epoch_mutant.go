//go:build mutant_epoch

package mailstore

const epochsAddUp = false
