//go:build mutant_expunge

package imapd

const expungesLater = false
