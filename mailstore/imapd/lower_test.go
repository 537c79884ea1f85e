package imapd

import (
	"bytes"
	"testing"
)

func TestAppendLowerIsToLowerBehindWhatIsThere(t *testing.T) {
	for _, s := range []string{"", "ABC xyz [@`{", "Žluťoučký KŮŇ", "plain THEN ŠKODA and MORE", "\xff\xfeBAD", "İstanbul ẞ"} {
		want := append([]byte("Kept "), bytes.ToLower([]byte(s))...)
		if got := appendLower([]byte("Kept "), []byte(s)); !bytes.Equal(got, want) {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}
