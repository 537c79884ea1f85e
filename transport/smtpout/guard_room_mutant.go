//go:build mutant_outside_full

package smtpout

const waitsForRoom = false
