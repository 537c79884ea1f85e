//go:build mutant_unsealed

package identity

const sealing = false
