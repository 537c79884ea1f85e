//go:build mutant_bcc

package intake

const hidesBcc = false
