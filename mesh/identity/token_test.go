package identity

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"posthouse/mesh"
)

func hash(b byte) (h mesh.KeyHash) {
	for i := range h {
		h[i] = b + byte(i)
	}
	return h
}

func testToken(t testing.TB, candidates int) Token {
	t.Helper()
	c := counting(0)
	var hashes []mesh.KeyHash
	for i := range candidates {
		hashes = append(hashes, hash(byte(40*i)))
	}
	tok, err := NewToken(&c, hashes)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func TestTokenIsReadAsItWasWritten(t *testing.T) {
	for n := 1; n <= 5; n++ {
		tok := testToken(t, n)
		if want := min(n, MaxPins); len(tok.Pins) != want {
			t.Errorf("%d pins, want %d", len(tok.Pins), want)
		}
		line := tok.Encode()
		spaced := " \n" + strings.ToLower(line[:30]) + "-\r\n\t " + line[30:60] + "  " + line[60:] + "\n"
		for _, s := range []string{line, strings.ToLower(line), spaced, strings.ReplaceAll(strings.ReplaceAll(line, "0", "o"), "1", "l")} {
			s = strings.Replace(s, "PHl", "PH1", 1)
			got, err := ParseToken(s)
			if err != nil {
				t.Fatalf("%q: %v", s, err)
			}
			if diff := cmp.Diff(tok.Encode(), got.Encode()); diff != "" {
				t.Error(diff)
			}
		}
	}
	if _, err := NewToken(new(counting), nil); err == nil {
		t.Error("a token that names nobody was made")
	}
}

func TestTokenOfVersion1IsStillRead(t *testing.T) {
	const v1 = "PH1-000G40R40M30E209185GR38E1W8124GK2GAHC5RR34D1P70X3RFG00820C20A1G7104JGA9A5CP2TBHF60RGW3TQ2R"
	tok, err := ParseToken(v1)
	if err == nil && tok.Encode() == testToken(t, 2).Encode() {
		return
	}
	t.Errorf("%v; version 1 of the test token is %s", err, testToken(t, 2).Encode())
}

func TestTokenMistakesAreOneSentence(t *testing.T) {
	good := testToken(t, 2).Encode()
	swap := func(i int, c string) string { return good[:i] + c + good[i+1:] }
	for _, tt := range []struct{ name, in, says string }{
		{"nothing", "  ", "empty"},
		{"a password", "hunter2", "must begin with PH1-"},
		{"the end of a token", good[20:], "must begin with PH1-"},
		{"a newer token", "PH2-" + good[4:], "newer Posthouse (PH2-)"},
		{"only the prefix", "PH1-", "incomplete"},
		{"cut early", good[:50], "incomplete"},
		{"cut late", good[:len(good)-1], "mistyped, or a part"},
		{"one pin cut out", good[:len(good)-16], "mistyped, or a part"},
		{"one letter wrong", swap(20, "Z"), "mistyped"},
		{"last letter wrong", swap(len(good)-1, "Z"), "mistyped"},
		{"a letter that no token has", swap(20, "U"), `'U'`},
		{"a letter of another alphabet", swap(20, "Ж"), `'Ж'`},
		{"doubled", good + good[4:], "mistyped"},
		{"a whole file", strings.Repeat(good, 20), "too long"},
		{"not text", "PH1-\xff\xfe", "cannot contain"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseToken(tt.in)
			if err == nil || !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestTokenPinsOnlyItsCandidates(t *testing.T) {
	tok := testToken(t, 3)
	for i := range 3 {
		if err := tok.Expect(hash(byte(40 * i))); err != nil {
			t.Error(err)
		}
	}
	near := hash(0)
	near[9]++
	if tok.Expect(near) == nil || tok.Expect(mesh.KeyHash{}) == nil {
		t.Error("a stranger was taken for a candidate")
	}
}

func TestProofHoldsForOneSessionAndOneJoiner(t *testing.T) {
	tok, session, joiner := testToken(t, 1), []byte("exporter of this session"), hash(1)
	sig := tok.Prove(session, joiner)
	if err := VerifyProof(tok.PublicKey(), session, joiner, sig); err != nil {
		t.Fatal(err)
	}
	c := counting(99)
	other, _ := NewToken(&c, []mesh.KeyHash{hash(0)})
	for name, err := range map[string]error{
		"replayed in another session": VerifyProof(tok.PublicKey(), []byte("exporter of that session"), joiner, sig),
		"for another joiner":          VerifyProof(tok.PublicKey(), session, hash(2), sig),
		"by another token":            VerifyProof(other.PublicKey(), session, joiner, sig),
		"without signature":           VerifyProof(tok.PublicKey(), session, joiner, nil),
		"without key":                 VerifyProof(nil, session, joiner, sig),
		"moved border":                VerifyProof(tok.PublicKey(), append(bytes.Clone(session), joiner[0]), joiner, sig),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestComparisonCode(t *testing.T) {
	a, b := hash(1), hash(2)
	code := ComparisonCode(a, b)
	if code != "Q3BF-2JKR-7YDK" {
		t.Errorf("the code of a known pair changed to %s: nodes of two versions would disagree", code)
	}
	if ComparisonCode(b, a) != code {
		t.Error("the two sides see different codes")
	}
	if ComparisonCode(a, hash(3)) == code {
		t.Error("another node has the same code")
	}
}

func FuzzParseToken(f *testing.F) {
	for n := 1; n <= 3; n++ {
		f.Add(testToken(f, n).Encode())
	}
	f.Add("ph1-")
	f.Add("PH1-ı")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseToken(s)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\r\n") {
				t.Errorf("more than one line: %q", err)
			}
			return
		}
		if again, err := ParseToken(tok.Encode()); err != nil || again.Encode() != tok.Encode() {
			t.Errorf("not stable: %v", err)
		}
	})
}
