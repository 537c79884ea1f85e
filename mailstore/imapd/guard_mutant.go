//go:build mutant_imap_guard

package imapd

const guarded = false
